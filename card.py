"""
Model cards: the README.md of a checkpoint, as the Hugging Face Hub shows it.

    write('out/demo')       says what the folder itself knows: how it was trained, in which layout and codec

train.py writes one into every checkpoint, under the licence "unknown", since whose data it was trained on it
cannot tell. hub.py makes the folder that is uploaded, with the licence that you name and the figures of
evaluate.py.
"""
import json
import math
import os
from glob import escape, glob

from safetensors import safe_open

from common.files import read_json, whole
from flatten import get_layout

TAGS = ['full-duplex', 'spoken-dialogue', 'speech', 'omniflatten', 'nanoduplex']
FIGURES = {     # of evaluation/metrics.json: what the card calls it
    'answer_accuracy': 'answers that are right', 'well_taken_rate': 'turns of the user dealt with well',
    'assistant_acc_by_10': 'answers that began within 10 frames', 'response_ms': 'response, mean, in ms',
    'false_start_rate': 'false starts', 'pause_taken_rate': 'pauses taken for the end',
    'user_acc_by_10': 'interrupted, silent within 10 frames',
    'backchannel_stopped_rate': 'backchannels that stopped it'}

CARD = """# {name}

A voice model of {n_param} parameters that nanoduplex trained: the architecture of Qwen2, over one sequence of
text, control tokens and speech codes. Layout: **{layout}**. {clock}

Codec: {codec}. It lies in `codec/`, and codes of any other mean nothing to this model.

## Load it

In a clone of nanoduplex, after `pip install -e '.[audio]'`:

{sample}

transformers opens the folder, too, with the same logits and ids (`AutoModelForCausalLM`, `AutoTokenizer`),
but knows nothing of the layout: it cannot converse.

## What it was trained on

{runs}

## Figures

{figures}

## Intended use, and limits

For research on spoken dialogue: who takes the turn, when, and what training makes of that. It has learned the
data named above and nothing else, so expect no knowledge and no language beyond them; voices, rooms and
microphones unlike theirs are understood less well. It may say what is false or offensive where its data did,
and nothing in it filters that. It does not tell that it is a machine: who lets people talk to it has to.
Do not use it to speak in the name of a person, or for decisions about people.

## Licence

{license}
"""

IN_CHUNKS = """```python
from checkpoint import load_checkpoint
from common.audio import write_audio
from decode import Sampling, converse, render
from inputs import listen_to_file

model, vocab, codec, info = load_checkpoint('FOLDER')       # where this card lies
user = listen_to_file('question.wav', codec, None, 6.0, 'question', '')     # and 6 s of silence to answer in
(dialogue,), _ = converse(model, vocab, info.layouts[-1], [user.codes], codec.silence_codes[0].tolist(),
                          sampling=Sampling(text_weight=info.text_weight))
print([turn['text'] for turn in dialogue['turns']])
write_audio('answer.wav', render(dialogue, codec, user.wave), codec.sample_rate)    # user left, model right
```"""

BY_TURNS = """```python
from checkpoint import load_checkpoint
from decode import Sampling
from inputs import listen_to_file
from respond import Asked, respond

model, vocab, codec, info = load_checkpoint('FOLDER')       # where this card lies
user = listen_to_file('question.wav', codec, None, 0.0, 'question', '')
dialogue, = respond(model, vocab, info.layouts[-1], [[Asked(user.codes)]], codec.silence_codes[0].tolist(),
                    sampling=Sampling(text_weight=info.text_weight))
print([turn['text'] for turn in dialogue['turns']])
```"""


READ_ALOUD = """```bash
python sample.py --checkpoint=FOLDER --input=rows.jsonl --output=said.jsonl
```"""


def write(folder, name=None, license='unknown', language=None, base_model=None, datasets=None):
    """
    Writes folder/README.md from config.json, and from evaluation/metrics.json, where it is there.
        name        None: the folder's
        license     an identifier of the Hub: mit, apache-2.0, …; unknown
        language    its codes: ['en']
        base_model, datasets    names on the Hub, 'Qwen/Qwen2-0.5B': folders of this machine say nothing
    """
    config = read_json(os.path.join(folder, 'config.json'))
    about = config['nanoduplex']
    head = dict(license=license, library_name='nanoduplex', pipeline_tag='audio-to-audio', language=language,
                base_model=base_model, datasets=datasets, tags=TAGS)
    # JSON is YAML, too, and needs no care for what a name may hold
    lines = [f'{key}: {json.dumps(value, ensure_ascii=False)}' for key, value in head.items() if value]
    layout, codec = get_layout(**about['layouts'][-1]), about['codec']
    chunk_ms = 1e3 * layout.speech_chunk / codec['rate_hz']
    clock = (f'It listens and talks in chunks of {chunk_ms:.0f} ms: it hears the user while it speaks.'
             if layout.order == 'chunks' else 'It goes by turns, without a clock.')
    runs = [f'{i}. {describe(run)}' for i, run in enumerate(about.get('runs', []), 1)]
    text = CARD.format(
        name=name or os.path.basename(os.path.abspath(folder)).removesuffix('.part'), layout=layout.name,
        n_param=f'{count_parameters(folder) / 1e6:,.1f} M', clock=clock, sample=sample(layout),
        codec=f'{codec["name"]}, {codec["rate_hz"]:g} frames a second, {codec["n_codes"]:,} codes, '
              f'fingerprint {codec["fingerprint"]}',
        runs='\n'.join(runs) or 'The folder does not say.', figures=figures(folder),
        license=f'Of the weights: {license}. '
                + 'Whoever publishes them has to say what their data allow. ' * (license == 'unknown')
                + 'Of the code: MIT.')
    with whole(os.path.join(folder, 'README.md')) as part, open(part, 'w', encoding='utf-8') as file:
        file.write('---\n' + '\n'.join(lines) + f'\n---\n\n{text}')


def sample(layout):
    """-> the lines that load a checkpoint of that layout and let it answer a recording"""
    if layout.period:
        return IN_CHUNKS
    is_asked = not layout.is_voice and layout.order != 'segments'
    return BY_TURNS if is_asked else READ_ALOUD


def count_parameters(folder):
    """From the heads of the files: nothing is loaded."""
    n = 0
    for path in glob(os.path.join(escape(folder), '*.safetensors')):
        if not path.endswith('optimizer.safetensors'):
            with safe_open(path, 'pt') as file:
                n += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return n


def describe(run):
    """What a run trained on (checkpoint.describe_run), in a sentence or two. Text of strangers stays text."""
    start = f'from `{run["init_from"]}`' if run['init_from'] else 'from random weights'
    data = ', '.join(f'`{name}`: {n:,} dialogues' for name, n in run['dialogues'].items())
    chosen = run['selected']
    best = f' The best step of the run by {chosen["by"]} on val: {chosen["value"]:.4g}.' if chosen else ''
    return (f'`{run["stages"]}` on `{run["data"]}` ({data}), {start}: {run["steps"]:,} steps, '
            f'{run["tokens"]:,} tokens, {run["hours"]:.2f} h of conversation heard; {run["optimizer"]}, '
            f'learning rate {run["learning_rate"]:g}, seed {run["seed"]}, torch {run["torch"]}, '
            f'nanoduplex at commit {run["commit"] or "unknown"}.{best}')


def figures(folder):
    """-> a table of what evaluate.py measured, where it did"""
    path = os.path.join(folder, 'evaluation', 'metrics.json')
    if not os.path.isfile(path):
        return 'Not measured yet: `python evaluate.py --checkpoint=FOLDER --data=DATA`.'
    found = read_json(path)
    rows = [(label, found[key]) for key, label in FIGURES.items() if found.get(key) is not None]
    rows = [(label, f'{value:.0f}' if label.endswith('in ms') else f'{100 * value:.1f} %')
            for label, value in rows]
    command = found.get('origin', {}).get('command', 'evaluate.py')
    table = '\n'.join(f'| {label} | {value} |' for label, value in rows)
    return (f'By `{command}`, of {found.get("n_turn", 0)} turns of the user. docs/evaluation.md of '
            'nanoduplex defines each. Data of another kind give other figures.\n\n'
            f'| figure | value |\n|---|---:|\n{table}')
