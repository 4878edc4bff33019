"""The whole state of a run on disk; a resumed run continues from it bit for bit.

    checkpointer.py    when a checkpoint is written, which one a run resumes from; called by a stage's loop
    shards.py          a trained model, in DeepSpeed's files
    state.py           everything else: JSON, safetensors, random generators
    writer.py          writing: hashed, flushed to the disk, read back; at once or in the background
    safe_pickle.py     reading DeepSpeed's files without running code from them
    manifest.py        the file that commits a checkpoint; verifying, finding, deleting
    compatibility.py   whether this run may resume from that checkpoint

What holds while a checkpoint is written: a rank that is killed leaves a folder without a manifest, which is
no checkpoint. A write that fails on any rank is reported to all ranks; they give this checkpoint up, keep
the previous one, and the run continues.
"""
