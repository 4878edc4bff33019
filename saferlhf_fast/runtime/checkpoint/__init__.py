"""The whole state of a run on disk, from which it goes on as if nothing had happened.

    checkpointer.py    when to write, from what to go on: what a stage's loop calls
    shards.py          a trained model's part, in DeepSpeed's files
    state.py           the rest: JSON, safetensors, random generators
    writer.py          writing: hashed, put on the disk, read again, in the background if wanted
    safe_pickle.py     reading DeepSpeed's files without running what they say
    manifest.py        what commits a checkpoint; verifying, finding, deleting
    compatibility.py   may this run go on from that checkpoint?

What holds while one is written: a rank that is killed leaves a folder without a manifest, which is no
checkpoint; a write that fails anywhere is told to all ranks, the checkpoint is given up, and the run goes on
with the one before.
"""
