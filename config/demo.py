# The demo: two million parameters learn to listen and to talk, in minutes on a laptop's CPU.
#   python data/demo/prepare.py && python train.py config/demo.py && python sample.py --data=data/demo
out_dir = 'out/demo'
data = 'data/demo'

# alignment first (hear the user, speak as the assistant), then dialogue in three streams, in one schedule
stages = 'asr.user+tts.assistant:250, duplex3:950'

# 4 rows * 512 tokens = 2,048 tokens a step: some eight questions, or 37 s of conversation at 55 tokens a
# second. A dialogue has 506 tokens at most, and attention over short rows costs a CPU least.
block_size = 512
batch_size = 2          # on two processes, or twice on one; 4 is a little faster on one
batch_tokens = 4 * 512

# 4 layers of 192 with heads of 64: narrower heads cost a CPU more time than they are worth.
n_layer = 4
n_head = 3
n_kv_head = 1
n_embd = 192
n_inner = 512

text_weight = 5.0       # one learned token in twenty is text, and it decides what is said
optimizer = 'muon'      # 1,000 steps do what AdamW needs 1,900 for
learning_rate = 3e-3
warmup_steps = 50
eval_interval = 200
log_interval = 50
