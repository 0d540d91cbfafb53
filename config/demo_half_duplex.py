# The stage between alignment and duplex dialogue: whole turns in four streams, without a clock. It starts
# from a model that is aligned already. A duplex3 run can start from its checkpoint:
# --init_from=out/demo_half_duplex
#   python train.py config/demo.py --stages=asr.user+tts.assistant:300 --out_dir=out/demo_aligned
#   python train.py config/demo_half_duplex.py
out_dir = 'out/demo_half_duplex'
data = 'data/demo'
init_from = 'out/demo_aligned'
stages = 'half_duplex:400'
block_size = 768
batch_size = 2
batch_tokens = 4 * 768
text_weight = 5.0
learning_rate = 1e-3
warmup_steps = 20
