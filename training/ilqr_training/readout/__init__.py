"""Fitting the readout on causal latents."""
