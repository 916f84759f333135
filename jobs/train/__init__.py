"""Training as DeepSpeed ZeRO jobs on Ray Train: `launch` on the driver's side, `loop` on the workers'.

launch.py            the driver's side
loop.py              the training loop, as every rank runs it
batches.py           what a training reads
model.py             what it starts with
engine.py            DeepSpeed
optimizer.py         AdamW, parameter groups, schedules
objective.py         who sees whom at a step, and the loss
checkpoints.py       taken in the background, restored; checkpoint_store.py: where they lie
pickled.py           checkpoints that hold code are refused
export.py            to a Hugging Face directory, or as an adapter
bad_loss.py          no numbers and spikes: stop, or skip
measure.py           held-out perplexity and attention mass on the way
metrics.py           the log, a line a step; machine.py: system metrics
estimate.py          FLOPs and memory: formulas
"""
