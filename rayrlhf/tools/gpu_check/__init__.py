"""`rayrlhf doctor --gpu`: ten steps that measure the GPU path, each in its own process."""
