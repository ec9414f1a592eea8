"""Parts of bench/paper.py, which carries out the paper's appendix in miniature.

settings   the networks, testbeds and lengths, and the paper's numbers
arms       an arm: one training with its teacher, and the hash of all that it depends on
plan       the arms of each table and figure
processes  commands in processes of their own: until when, where they log, what CPU time they took
training   trains an arm and records its teacher, unless that is done
scores     what a finished arm scores, by `fastdisco eval`
collect    samples and rows from what is finished
pages      the tables beside the paper's numbers"""
