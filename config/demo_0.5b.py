# The demo's dialogues for a model of Qwen2-0.5B's size, from random weights: a minute on an H200.
#   python train.py config/demo.py config/demo_0.5b.py
#   python talk.py --checkpoint=out/demo_0.5b --max_talkers=16
out_dir = 'out/demo_0.5b'

n_layer = 24
n_head = 14
n_kv_head = 2
n_embd = 896
n_inner = 4864          # 359 M parameters, 1,024 ids included

# 16 rows * 512 tokens: four times the demo's step, and a third as many of them
batch_size = 16
batch_tokens = 16 * 512
stages = 'duplex3:400'
learning_rate = 2e-3
eval_interval = 400
n_listen = 0
compile = True
