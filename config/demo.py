# The demo: two million parameters learn to listen and to talk in some minutes on a laptop's CPU.
#   python data/demo/prepare.py && python train.py config/demo.py && python sample.py --data=data/demo
out_dir = 'out/demo'
data = 'data/demo'

# alignment first (hear the user, speak as the assistant), then the dialogue of three streams; one schedule over both
stages = 'asr.user+tts.assistant:400, duplex3:1200'

# 2 rows * 1024 tokens = 2,048 tokens a step, some ten questions; at 55 tokens a second 37 s of conversation
block_size = 1024
batch_size = 2
batch_tokens = 2 * 1024
text_weight = 5.0       # one learned token in twenty is text, and the rest follows from it

# 4 layers of 192 with heads of 64: narrower heads cost a CPU more time than they are worth
n_layer = 4
n_head = 3
n_kv_head = 1
n_embd = 192
n_inner = 512

learning_rate = 3e-3
warmup_steps = 50
eval_interval = 200
log_interval = 50
