"""
Checkpoints: what a run writes, and how it is read back. Nothing in them is pickled.

    out/demo                    a Hugging Face folder of the weights that did best on val
        config.json             as transformers has it; the entry "nanoduplex" is Info below
        model.safetensors       tokenizer.json, vocab.json, merges.txt, …
        codec/                  the speech codec, or what names it
        step-001900/            the same of the latest step, from which a run goes on, with
            optimizer.safetensors, state.json

    checkpoint = load_checkpoint('out/demo')
    checkpoint.model, checkpoint.vocab, checkpoint.layout, checkpoint.codec
"""
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from glob import glob
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from codec import load_codec
from common.files import read_json, whole, write_json
from flatten import get_layout
from model import Qwen2
from parallel import gather, scatter
from vocabulary import Vocabulary


class Info(NamedTuple):
    """What a checkpoint of ours says of itself."""
    layouts: list           # [Layout] that it was trained in, also by earlier runs; decodes in the last
    text_weight: float      # of a text token in the loss
    code_start: int         # the id of speech code 0
    n_codes: int
    codec: dict             # what codec.describe() says


class Checkpoint(NamedTuple):
    model: Qwen2
    vocab: Vocabulary
    codec: object
    info: Info

    @property
    def layout(self):
        return self.info.layouts[-1]


def write_info(info):
    """Info -> the entry "nanoduplex" of config.json."""
    return info._asdict() | dict(layouts=[layout.settings() for layout in info.layouts])


def read_info(folder):
    """The entry "nanoduplex" of a folder's config.json -> Info; None for a model that is not ours."""
    entry = read_json(os.path.join(folder, 'config.json')).get('nanoduplex')
    if not entry:
        return None
    if 'layouts' not in entry:      # as it was written before November 2026
        chunks = dict(speech_chunk=entry.pop('speech_chunk') or None, text_chunk=entry.pop('text_chunk'))
        names = [*entry.pop('learned', []), entry.pop('layout')]
        entry['layouts'] = [dict(name=name, **chunks) for name in dict.fromkeys(names)]
    return Info(**entry | dict(layouts=[get_layout(**settings) for settings in entry['layouts']]))


def load_checkpoint(folder, device='cpu'):
    """Reads a folder that train.py wrote. Raises ValueError for any other."""
    if not os.path.isfile(os.path.join(folder, 'config.json')):
        raise ValueError(f'{folder} is no checkpoint: it has no config.json (train one: python train.py '
                         'config/demo.py)')
    info = read_info(folder)
    if not info:
        raise ValueError(f'{folder}/config.json has no entry "nanoduplex": train.py did not write this '
                         'model, so its layout and codec are unknown')
    control = [name for layout in info.layouts for name in layout.control]
    vocab = Vocabulary.load(folder, info.n_codes, control)
    model = Qwen2.from_pretrained(folder).to(device).eval()
    check_vocabulary(folder, model, vocab)
    codec = load_codec(os.path.join(folder, 'codec'))
    if codec.describe() != info.codec:
        raise ValueError(f'{folder} was trained with codec {info.codec}, in its folder lies '
                         f'{codec.describe()}')
    return Checkpoint(model, vocab, codec, info)


def check_vocabulary(folder, model, vocab):
    """Ids must mean the same to the weights and to the tokenizer."""
    if model.config.vocab_size > vocab.size or (model.config.vocab_size < vocab.size and not vocab.untrained):
        raise ValueError(f'{folder}: its model has {model.config.vocab_size} ids, its tokenizer with '
                         f'{vocab.n_codes} codes {vocab.size}: the checkpoint is of another vocabulary')


def check_codec(folder, codec, dialogues):
    """Codes must mean the same to the checkpoint in folder, trained with codec, and to the data."""
    theirs = dialogues.codec
    if codec != theirs:
        raise ValueError(f'{dialogues.folder} was made with codec {theirs["name"]} {theirs["fingerprint"]}, '
                         f'{folder} was trained with codec {codec["name"]} {codec["fingerprint"]}: prepare '
                         "the data with the checkpoint's codec, or take the checkpoint that goes with it")


# ------------------------------------------------------------------------------------------------------------
# a run's states

class Snapshot(NamedTuple):
    """The tensors of a state, on the CPU."""
    model: Qwen2
    moments: dict       # AdamW's: 'model.norm.weight.exp_avg', …; and 'rng', of the random numbers


def take_snapshot(model, optimizer, place, copies):
    """
    -> Snapshot on the first process, None on others. If the model is split over the processes, all of them
    call this together. copies: training goes on while the snapshot is used; else it may share the model's
    memory, where that is a CPU's.
    """
    weights = model.state_dict()        # before the parameters are looked at: it splits what is gathered
    moments = {'rng': torch.get_rng_state()}
    for name, p in model.named_parameters():
        assert p in optimizer.state, name
        moments |= {f'{name}.{key}': value for key, value in optimizer.state[p].items()}
    weights, moments = ({name: gather(tensor, place, copies) for name, tensor in named.items()}
                        for named in (weights, moments))
    if not place.is_main:
        return None
    with torch.device('meta'):
        whole_model = Qwen2(model.config)
    whole_model.load_state_dict(weights, assign=True)
    return Snapshot(whole_model, moments)


def save_state(out_dir, snapshot, vocab, info, codec_folder, state):
    """Writes out_dir/step-000300, from which a run goes on as if it had not stopped. Deletes older ones."""
    folder = os.path.join(out_dir, f'step-{state["step"]:06d}')
    with whole(folder) as part:
        snapshot.model.save_pretrained(part, extra={'nanoduplex': write_info(info)})
        vocab.save(part)
        if os.path.isdir(codec_folder):
            shutil.copytree(codec_folder, os.path.join(part, 'codec'))
        save_file(snapshot.moments, os.path.join(part, 'optimizer.safetensors'))
        write_json(os.path.join(part, 'state.json'), state)
    for old in glob(os.path.join(out_dir, 'step-*')):
        if old != folder:
            shutil.rmtree(old)
    return folder


class Saver:
    """Writes states, and the best model. In the background training goes on meanwhile, from a snapshot that
    shares no memory with the model; the run waits for the last one with wait()."""

    def __init__(self, in_background):
        self.in_background, self.thread, self.written = in_background, ThreadPoolExecutor(1), None

    def save(self, out_dir, snapshot, vocab, info, codec_folder, state):
        self.wait()         # one at a time; what went wrong with the last one is raised here
        arguments = out_dir, snapshot, vocab, info, codec_folder, dict(state)
        if self.in_background:
            self.written = self.thread.submit(self.write, *arguments)
        else:
            self.write(*arguments)

    @staticmethod
    def write(out_dir, snapshot, vocab, info, codec_folder, state):
        folder = save_state(out_dir, snapshot, vocab, info, codec_folder, state)
        if state['best_step'] == state['step']:
            publish(folder, out_dir)

    def wait(self):
        if self.written:
            written, self.written = self.written, None
            written.result()


def load_state(folder, model, optimizer):
    """Sets optimizer and random numbers back to where they were -> the rest of the state"""
    tensors = load_file(os.path.join(folder, 'optimizer.safetensors'))
    missing = [name for name, _ in model.named_parameters() if f'{name}.exp_avg' not in tensors]
    if missing:
        raise ValueError(f'{folder} was saved by another version of this code (it has no state of '
                         f'{missing[0]}): start from its weights, --init_from={folder}, '
                         'into another --out_dir')
    for name, p in model.named_parameters():
        moments = {key: scatter(tensors[f'{name}.{key}'], p) for key in ('exp_avg', 'exp_avg_sq')}
        optimizer.state[p] = dict(moments, step=tensors[f'{name}.step'].to(p.device))
    torch.set_rng_state(tensors['rng'])
    return read_json(os.path.join(folder, 'state.json'))


def find_state(out_dir, place):
    """
    -> the step-… folder to go on from, None where there is none. Called by all processes together.

    Nodes need not share a disk. Then only the first process's node has states, and after a restart the first
    process may be on another node. So the newest state that any process sees counts. If the first process
    lacks it, it is sent the whole run, which it continues. Other nodes are sent the state, to
    OUT_DIR.received, which is to be deleted once it is read.
    """
    seen = see_states(out_dir, place)
    newest = max(step for step, _ in seen)
    if newest < 0:
        return None
    source = [step for step, _ in seen].index(newest)
    for rank, (step, run_id) in enumerate(seen):
        if step >= 0 and run_id != seen[source][1]:
            raise ValueError(f'out_dir={out_dir} holds one run where process {source} runs and another where '
                             f'process {rank} does: rename the folder that is not to go on')
    if seen[0][0] < newest:
        if place.is_main and os.path.exists(out_dir):
            print(f'{out_dir} was behind the run of process {source}, moved to {move_aside(out_dir)}')
        send_folder(out_dir, source, out_dir if place.is_main else None, place)
        seen = see_states(out_dir, place)       # now also that of others on the first process's node
    is_lacking = seen[place.rank][0] < newest
    name = f'step-{newest:06d}'
    folder = os.path.join(out_dir + '.received' if is_lacking else out_dir, name)
    if any(step < newest for step, _ in seen):
        target = folder if is_lacking and place.local_rank == 0 else None
        send_folder(os.path.join(out_dir, name), source, target, place)
    return folder


def see_states(out_dir, place):
    """-> [(step of the latest state, run_id)] of all processes; -1 where a process sees none"""
    folder = last_state(out_dir)
    state = read_json(os.path.join(folder, 'state.json')) if folder else dict(step=-1)
    return place.gather((state['step'], state.get('run_id')))


def send_folder(folder, source, target, place, n_byte=2 ** 26):
    """Copies the files of folder on the process source to target on each process that gives one, in pieces of
    n_byte. Called by all processes together."""
    is_source = place.rank == source
    paths = glob(os.path.join(folder, '**'), recursive=True) if is_source else []
    files = [(os.path.relpath(path, folder), os.path.getsize(path)) for path in paths if os.path.isfile(path)]
    files = place.gather(files)[source]
    with whole(target) if target else nullcontext() as part:
        for name, size in files:
            piece = torch.empty(n_byte, dtype=torch.uint8)
            with ExitStack() as stack:
                if is_source:
                    read = stack.enter_context(open(os.path.join(folder, name), 'rb'))
                if target:
                    os.makedirs(os.path.dirname(os.path.join(part, name)), exist_ok=True)
                    written = stack.enter_context(open(os.path.join(part, name), 'wb'))
                for at in range(0, size, n_byte):
                    n = min(n_byte, size - at)
                    if is_source:
                        read.readinto(memoryview(piece.numpy())[:n])
                    piece = place.broadcast(piece, source)
                    if target:
                        written.write(memoryview(piece.numpy())[:n])


def publish(folder, out_dir):
    """The files of a saved step become those of out_dir, each replaced whole; the weights come last."""
    paths = glob(os.path.join(folder, '**'), recursive=True)
    for path in sorted(paths, key=lambda path: path.endswith('model.safetensors')):
        target = os.path.join(out_dir, os.path.relpath(path, folder))
        if os.path.isfile(path) and os.path.basename(path) not in ('optimizer.safetensors', 'state.json'):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with whole(target) as part:
                shutil.copy(path, part)


def last_state(out_dir):
    """The latest step-… folder of a run, None where there is none."""
    folders = [path for path in glob(os.path.join(out_dir, 'step-*')) if not path.endswith('.part')]
    return max(folders, default=None)


def move_aside(out_dir):
    """Gives the folder of a run that is not continued another name -> that name"""
    n = 1
    while os.path.exists(f'{out_dir}.{n}'):
        n += 1
    os.rename(out_dir, f'{out_dir}.{n}')
    return f'{out_dir}.{n}'
