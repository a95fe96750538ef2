"""The parts of a run on a GPU, one module each with a function `measure`, and what they share."""
