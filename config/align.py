# Stage 1, modality alignment: Qwen2-0.5B learns to write down what is said, and to say what is written
# (paper, section 3.1). With your data: --data=data/librispeech:0.3,data/wenetspeech:0.7
#   torchrun --standalone --nproc_per_node=8 train.py config/align.py
out_dir = 'out/align'
data = 'data/speech'                # the paper: 100,000 h of read and spontaneous speech, English and Chinese
init_from = 'models/Qwen2-0.5B'     # huggingface.co/Qwen/Qwen2-0.5B; grows from 151,936 to 156,032 ids
stages = 'asr+tts:5epochs'

# The paper's rows of 1,024 tokens hold 40 s of speech at 25 Hz, a few sentences. 16 rows * 1,024 tokens * 8
# GPUs = 131,072 tokens a micro-step; * 763 = 100,007,936: the paper's 100 M tokens a step. 100,000 h at 25 Hz
# are 9 G tokens of speech, and twice that as asr and tts: 180 steps an epoch. With less data take smaller
# steps.
block_size = 1024
batch_size = 16
batch_tokens = 763 * 131_072

learning_rate = 2e-5                # the paper's, with AdamW at 0.9, 0.95 and weight decay 0.1
min_learning_rate = 0.0             # the paper doesn't say it, nor the warm-up: one in fifty of 900 steps
warmup_steps = 18
eval_interval = 20
log_interval = 1
compile = True
