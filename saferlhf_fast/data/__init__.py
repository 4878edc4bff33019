"""Data: what a recipe's `data` names -> examples -> batches.

files            one file -> rows with their places (JSON, CSV, Parquet; the errors that name a line)
sources          files, folders, Hub names and mixtures of them -> rows
formats          row -> conversation, preference or prompt (docs/data.md has the list)
records          those three, harm labels of responses, and checked fields
harm_taxonomy    the categories and severities of harm, and their names in other taxonomies
templates        messages -> token ids, and which of them are learned
counted_records  the records of all sources, with counts of those that are not used
report           these counts
examples         records -> dialogues and prompts of limited length
pairs            records -> pairs of responses to one prompt
batches          split by prompt, the order of an epoch, shares of ranks, padded tensors, harm labels

Needs neither transformers nor deepspeed; `datasets` is imported only for Hub names and saved data sets.
"""
