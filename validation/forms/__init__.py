"""The forms in which other exporters write the same model: made of a small export, repacked, and compared."""
