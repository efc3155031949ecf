"""Other trainings from scratch, one file each, on the parts of the project's root: see README.md in this folder."""
