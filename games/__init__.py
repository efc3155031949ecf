"""Games whose state is a page of text, for the GPT to read. `catch.py` is a template for your own."""
