"""`saferlhf-fast data inspect | convert | split`: what is in data sets, other forms, parts by prompt."""
