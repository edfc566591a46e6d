"""What is done to a bare denoiser: read by hooks, cut behind a layer, given adapters."""
