"""Training as DeepSpeed ZeRO jobs on Ray Train: `launch` on the driver's side, `loop` on the workers'."""
