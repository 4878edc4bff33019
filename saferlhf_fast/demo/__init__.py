"""The whole loop on an embedded world, with gold scores to check it by: no data, no network, minutes on two
cores.
"""
