# Stage 2, half-duplex dialogue in four streams, turn by turn: hear, write it down, write an answer, say it
# (paper, section 3.2).
#   torchrun --standalone --nproc_per_node=8 train.py config/half_duplex.py
out_dir = 'out/half_duplex'
data = 'data/dialogues'             # the paper: 2,000 h from 390,000 text dialogues (data/simulate.py)
init_from = 'out/align'
stages = 'half_duplex:5epochs'

# 2 rows * 8,192 tokens * 8 GPUs = 131,072 tokens a micro-step; * 763 = 100,007,936: the paper's 100 M tokens
# a step. But 2,000 h are some 400 M tokens: 4 such steps an epoch, 20 in all, in which a model hardly moves;
# train.py says so. runs/omniflatten.sh takes steps of 1 M tokens, 400 an epoch and 2,000 in all:
# --batch_tokens=1048576 --warmup_steps=100 --eval_interval=200
block_size = 8192
batch_size = 2
batch_tokens = 763 * 131_072

learning_rate = 2e-5
warmup_steps = 2
eval_interval = 4
log_interval = 1
compile = True
