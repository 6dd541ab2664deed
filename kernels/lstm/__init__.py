"""Triton kernels of the coordinate-wise recurrent rules (`LSTMRule`, `RNNPropRule`)."""
