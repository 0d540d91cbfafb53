# The last stage: the text goes, speech answers speech. It starts from the demo's three streams.
#   python train.py config/demo_duplex2.py && python sample.py --checkpoint=out/demo_duplex2 --data=data/demo
out_dir = 'out/demo_duplex2'
data = 'data/demo'
init_from = 'out/demo'
stages = 'duplex2:400'
block_size = 768
batch_size = 2
batch_tokens = 4 * 768
learning_rate = 1e-3
warmup_steps = 20
