# The last stage: the assistant's text goes, too, and speech answers speech (paper, section 3.3). It is the
# paper's weakest model by far (3.06 against 5.15 in Chinese): use the one before.
#   torchrun --standalone --nproc_per_node=8 train.py config/duplex2.py
#   python sample.py --checkpoint=out/duplex2 --user=question.wav
out_dir = 'out/duplex2'
data = 'data/dialogues'
init_from = 'out/duplex3'
stages = 'duplex2:5epochs'          # 50 tokens a second at 25 Hz: 164 s a row, 360 M tokens in 2,000 h

block_size = 8192
batch_size = 2
batch_tokens = 763 * 131_072

learning_rate = 2e-5
warmup_steps = 2
eval_interval = 4
log_interval = 1
compile = True
