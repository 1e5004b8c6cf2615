"""The command line: `vqkernels demo | train | reconstruct | encode | decode | bench | build | info`."""
