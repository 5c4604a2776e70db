"""Images with a mask each, the class of every pixel."""
