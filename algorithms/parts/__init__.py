"""What the trainings in this folder share."""
