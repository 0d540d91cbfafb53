# The demo: two million parameters learn to listen and to talk, in two minutes on a laptop's CPU.
#   python data/demo/prepare.py && python train.py config/demo.py && python sample.py --data=data/demo
out_dir = 'out/demo'
data = 'data/demo'

# dialogue in three streams from the start: an alignment before it buys nothing here (docs/claims.md)
stages = 'duplex3:1200'

# 4 rows * 512 tokens = 2,048 tokens a step: some eight questions, or 37 s of conversation at 55 tokens a
# second. A dialogue has 506 tokens at most, and attention over short rows costs a CPU least.
block_size = 512
batch_size = 2          # on two processes, or twice on one; 4 is a little faster on one
batch_tokens = 4 * 512

# 2 layers of 256 with heads of 64: more layers, or narrower heads, cost a CPU more time than they are worth
n_layer = 2
n_head = 4
n_kv_head = 1
n_embd = 256
n_inner = 768

# codes that the codec takes for alike start alike, three times as far apart as text: so voices that were
# never heard are understood sooner
new_rows = 'codec'
new_rows_scale = 3.0

text_weight = 5.0       # one learned token in twenty is text, and it decides what is said
optimizer = 'muon'      # half as many steps as AdamW needs
learning_rate = 3e-3
warmup_steps = 50
eval_interval = 300
log_interval = 50
