# Stage 3, full-duplex dialogue in three streams and chunks of 400 ms: the user's text goes, and both sides
# share one clock (paper, section 3.3).
#   torchrun --standalone --nproc_per_node=8 train.py config/duplex3.py
#   python sample.py --checkpoint=out/duplex3 --user=question.wav
out_dir = 'out/duplex3'
data = 'data/dialogues'
init_from = 'out/half_duplex'
stages = 'duplex3:5epochs'          # 10 codes of the user, 2 of text, 10 of the assistant: 55 tokens a second

# A row of 8,192 tokens is 149 s of conversation. 2,000 h are 396 M tokens: 4 steps of the paper's 100 M
# tokens an epoch, or 378 of 1 M (see half_duplex.py).
block_size = 8192
batch_size = 2
batch_tokens = 763 * 131_072

learning_rate = 2e-5
warmup_steps = 2
eval_interval = 4
log_interval = 1
compile = True
