"""The pictures of the benches: module NAME has draw(result), which makes the matplotlib figure of
bench/results/NAME-<device>.json from the content of that file alone.  No module here imports torch
or fastdisco; bench/harness/pictures.py writes the files."""
