"""One forward of the model, many trajectories, and the probes that ask for them."""
