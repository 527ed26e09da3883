"""The generative model: priors, dynamics, likelihoods, and the readout of movement."""
