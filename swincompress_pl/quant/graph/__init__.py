"""A network as a graph of quantizable nodes, from which training, calibration and the integer Program are derived."""
