"""
Checkpoints: what a run writes, and how it is read back. Nothing in them is pickled.

    out/demo                    a Hugging Face folder of the weights that did best on val
        config.json             as transformers has it; the entry "nanoduplex" is Info below
        model.safetensors       tokenizer.json, vocab.json, merges.txt, …
        codec/                  the speech codec, or what names it
        README.md               the model card (card.py)
        manifest.json           size and SHA-256 of all but the card: written last, checked first of all
        step-001200/            the same of the latest step, from which a run goes on, with
            optimizer.safetensors, state.json
        step-001800/            … of the one saved before it, in case that one is damaged; and of the best

    checkpoint = load_checkpoint('out/demo')
    checkpoint.model, checkpoint.vocab, checkpoint.layout, checkpoint.codec
"""
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from glob import escape, glob
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import card
from codec import load_codec
from common.files import read_json, remove, whole, write_json
from common.manifest import NAME, find_damage, list_files, read_manifest, write_manifest
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
    runs: list = []         # what each run trained it on, see describe_run; the last is the one that wrote it


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
    """Reads a folder that train.py wrote. Raises ValueError for any other, and for a damaged one."""
    check(folder)
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


def check(folder, tells=True):
    """
    Raises ValueError, with the files, where a folder of train.py is not as it was written. One without a
    manifest, as before November 26, 2026, or from which it was deleted to change a file by hand, is taken as
    it is, with a note (tells). So is the folder of another program, without one.
    """
    damage = find_damage(folder)
    if damage:
        others = [path for path in states(folder).values() if not find_damage(path)]
        raise ValueError(f'{folder} is damaged: {", ".join(damage)}; '
                         + (f'{others[0]} is whole' if others else 'take another copy')
                         + f' (if you changed it on purpose, delete its {NAME})')
    path = os.path.join(folder, 'config.json')
    if damage is None and tells and os.path.isfile(path) and read_json(path).get('nanoduplex'):
        print(UNCHECKED.format(folder))


UNCHECKED = f'note: {{}} has no {NAME}, so nobody can tell whether its files are as they were written'


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
                         "the data with the checkpoint's codec, take the checkpoint that goes with it, or "
                         'train anew, into another folder or without --resume')


MOMENTS = {'AdamW': ('exp_avg', 'exp_avg_sq'), 'Muon': ('momentum_buffer',)}     # what each keeps


# ------------------------------------------------------------------------------------------------------------
# a run's states

class Snapshot(NamedTuple):
    """The tensors of a state, on the CPU."""
    model: Qwen2
    moments: dict       # the optimizer's: 'model.norm.weight.exp_avg', …; and 'rng', of the random numbers

    def on(self, device, dtype):
        """-> the model there, to be used while this one is written"""
        return assemble(self.model.config, {name: x.to(device, dtype, copy=True)
                                            for name, x in self.model.state_dict().items()})


def assemble(config, weights):
    """-> a model of these weights themselves, no copy"""
    with torch.device('meta'):
        model = Qwen2(config)
    model.load_state_dict(weights, assign=True)
    return model


def take_snapshot(model, optimizer, place):
    """-> Snapshot on the first process, None on others. If the model is split over the processes, all of them
    call this together. Training may go on while the snapshot is used: it shares no memory with the model.
    optimizer: None: of the model only"""
    weights = model.state_dict()        # before the parameters are looked at: it splits what is gathered
    moments = {'rng': torch.get_rng_state()}
    for name, p in model.named_parameters() if optimizer else ():
        assert p in optimizer.state, name
        moments |= {f'{name}.{key}': value for key, value in optimizer.state[p].items()}
    weights, moments = ({name: gather(tensor, place) for name, tensor in named.items()}
                        for named in (weights, moments))
    if not place.is_main:
        return None
    return Snapshot(assemble(model.config, weights), moments)


def describe_run(state):
    """A run's state -> what its checkpoints say of it: on what it trained so far and, at the best step, which
    figure of val chose it."""
    facts, ending = state['facts'], ': dialogues'
    names = 'data', 'stages', 'init_from', 'optimizer', 'learning_rate', 'seed', 'torch', 'commit'
    is_best = state['best_step'] == state['step']
    return {name: facts.get(name) for name in names} | dict(
        steps=state['step'], tokens=state['step'] * facts['batch_tokens'], hours=state['sec_heard'] / 3600,
        dialogues={name.removesuffix(ending): n for name, n in facts.items() if name.endswith(ending)},
        selected=dict(by=state['best_by'], value=state['best']) if is_best else None)


def save_state(out_dir, snapshot, vocab, info, codec_folder, state):
    """Writes out_dir/step-000300, from which a run goes on as if it had not stopped. Deletes all older ones
    but the one before, and the best."""
    folder = os.path.join(out_dir, f'step-{state["step"]:06d}')
    with whole(folder) as part:
        info = info._replace(runs=[*info.runs, describe_run(state)])
        snapshot.model.save_pretrained(part, extra={'nanoduplex': write_info(info)})
        vocab.save(part)
        if os.path.isdir(codec_folder):
            shutil.copytree(codec_folder, os.path.join(part, 'codec'))
        save_file(snapshot.moments, os.path.join(part, 'optimizer.safetensors'))
        write_json(os.path.join(part, 'state.json'), state)
        write_manifest(part)
        card.write(part)        # not in the manifest: people edit it
    saved = states(out_dir)
    past = [step for step in saved if step <= state['step']]    # later ones are damaged, and were passed over
    for step, old in saved.items():
        if step not in (*past[:2], state['best_step']):
            shutil.rmtree(old)
    for part in glob(os.path.join(escape(out_dir), 'step-*.part')):     # of a process that was killed
        shutil.rmtree(part)
    return folder


class Saver:
    """Writes states, and the best model, while training goes on; the run waits for the last one with wait().
    It raises ValueError, and save() does for the one before, where a state could not be written."""

    def __init__(self):
        self.thread, self.written, self.target = ThreadPoolExecutor(1), None, None

    @property
    def is_busy(self):
        return self.written is not None and not self.written.done()

    def save(self, out_dir, snapshot, vocab, info, codec_folder, state):
        self.wait()         # one at a time
        self.target = out_dir, state['step']
        arguments = out_dir, snapshot, vocab, info, codec_folder, dict(state)
        self.written = self.thread.submit(self.write, *arguments)

    @staticmethod
    def write(out_dir, snapshot, vocab, info, codec_folder, state):
        folder = save_state(out_dir, snapshot, vocab, info, codec_folder, state)
        if state['best_step'] == state['step']:
            publish(folder, out_dir)

    def wait(self):
        written, self.written = self.written, None
        try:
            return written and written.result()
        except (OSError, SafetensorError) as error:     # the disk is full, or may no longer be written to
            out_dir, step = self.target
            raise ValueError(f'{out_dir}: step {step} could not be saved ({error}); mend that, and go on '
                             f'from {last_state(out_dir) or "the start"} with --resume=true') from None


def load_state(folder, model, optimizer):
    """Sets optimizer and random numbers back to where they were -> the rest of the state"""
    path = os.path.join(folder, 'optimizer.safetensors')
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:     # of a folder without a manifest
        raise ValueError(f'{path} cannot be read: {error}') from None
    for name, p in model.named_parameters():
        keys = MOMENTS['AdamW' if f'{name}.step' in tensors else 'Muon']
        if not all(f'{name}.{key}' in tensors for key in keys):
            raise ValueError(f'{folder} was saved by another version of this code (it has no state of '
                             f'{name}): start from its weights, --init_from={folder}, into another --out_dir')
        optimizer.state[p] = {key: scatter(tensors[f'{name}.{key}'], p) for key in keys}
        if f'{name}.step' in tensors:
            optimizer.state[p]['step'] = tensors[f'{name}.step'].to(p.device)
    torch.set_rng_state(tensors['rng'])
    return read_json(os.path.join(folder, 'state.json'))


def find_state(out_dir, place):
    """
    -> the step-… folder to go on from, None where there is none. Called by all processes together.

    Nodes need not share a disk. Then only the first process's node has states, and after a restart the first
    process may be on another node. So the newest state that any process sees counts. If the first process
    lacks it, it is sent the whole run, which it continues. Other nodes are sent the state, to
    OUT_DIR.received, which is to be deleted once it is read.

    A damaged state does not count. Raises ValueError, on all processes, where there is no other.
    """
    seen, complaints = see_states(out_dir, place)
    newest = max(step for step, _ in seen)
    if newest < 0 and complaints:
        raise ValueError(complaints[0])
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
        seen, _ = see_states(out_dir, place)    # now also that of others on the first process's node
    is_lacking = seen[place.rank][0] < newest
    name = f'step-{newest:06d}'
    folder = os.path.join(out_dir + '.received' if is_lacking else out_dir, name)
    if any(step < newest for step, _ in seen):
        target = folder if is_lacking and place.local_rank == 0 else None
        send_folder(os.path.join(out_dir, name), source, target, place)
    return folder


def see_states(out_dir, place):
    """-> [(step of the latest whole state, run_id)] of all processes, -1 where a process sees none; and
    [what the trouble is] of those that see none, but ought to"""
    folder, complaint = whole_state(out_dir, tells=place.local_rank == 0)
    state = read_json(os.path.join(folder, 'state.json')) if folder else {}
    seen = place.gather((state.get('step', -1), state.get('run_id'), complaint))
    return [(step, run_id) for step, run_id, _ in seen], [complaint for *_, complaint in seen if complaint]


def whole_state(out_dir, tells):
    """-> the latest state whose files are as they were written, or None; and a sentence where there is none,
    but there was. tells: prints which states were passed over."""
    damaged, needed = [], ('config.json', 'model.safetensors', 'optimizer.safetensors', 'state.json')
    for folder in states(out_dir).values():
        damage = find_damage(folder)
        if damage is None:      # it has no manifest: what can be said is what is not there at all
            damage = [f'{name} is missing' for name in needed if name not in os.listdir(folder)]
            if tells and not damage:
                print(UNCHECKED.format(folder))
        if not damage:
            if damaged and tells:
                print(f'{"; ".join(damaged)}: going on from {folder}')
            return folder, None
        damaged.append(f'{folder} is damaged ({", ".join(damage)})')
    has_saved = os.path.isfile(os.path.join(out_dir, 'model.safetensors'))
    lost = '; '.join(damaged) or (f'{out_dir} holds a model, but no step-… folder' if has_saved else None)
    return None, lost and (f'{lost}: there is nothing whole to go on from; bring one back, or start anew, in '
                           'another --out_dir or without --resume')


def send_folder(folder, source, target, place, n_byte=2 ** 26):
    """Copies the files of folder on the process source to target on each process that gives one, in pieces of
    n_byte. Called by all processes together."""
    is_source = place.rank == source
    names = [*list_files(folder), NAME] if is_source else []
    files = [(name, os.path.getsize(os.path.join(folder, name))) for name in names
             if os.path.isfile(os.path.join(folder, name))]
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


PRIVATE = 'optimizer.safetensors', 'state.json'     # of a state, not of the model


def publish(folder, out_dir):
    """The files of a saved step become those of out_dir, each replaced whole; the weights come last, and then
    what was written of all of them."""
    for name in sorted(list_files(folder), key=lambda name: name == 'model.safetensors'):
        if name not in PRIVATE:
            target = os.path.join(out_dir, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with whole(target) as part:
                shutil.copy(os.path.join(folder, name), part)
    if public := public_manifest(folder):
        write_json(os.path.join(out_dir, NAME), public)
    else:
        remove(os.path.join(out_dir, NAME))


def public_manifest(folder):
    """-> what the manifest of a saved step says of the files that are published"""
    return {name: value for name, value in (read_manifest(folder) or {}).items() if name not in PRIVATE}


def publish_again(out_dir, best_step):
    """The run may have been killed while it published its best step, or what it published be damaged."""
    best = states(out_dir).get(best_step)
    if best and not find_damage(best):
        if find_damage(out_dir) != [] or read_manifest(out_dir) != public_manifest(best):
            publish(best, out_dir)


def states(out_dir):
    """-> {step: folder} of the step-… folders of a run, the latest first"""
    paths = {path: re.fullmatch(r'step-(\d+)', os.path.basename(path))
             for path in glob(os.path.join(escape(out_dir), 'step-*')) if os.path.isdir(path)}
    return dict(sorted(((int(match[1]), path) for path, match in paths.items() if match), reverse=True))


def last_state(out_dir):
    """The latest step-… folder of a run, None where there is none."""
    return next(iter(states(out_dir).values()), None)


def move_aside(out_dir):
    """Gives the folder of a run that is not continued another name -> that name"""
    n = 1
    while os.path.exists(f'{out_dir}.{n}'):
        n += 1
    os.rename(out_dir, f'{out_dir}.{n}')
    return f'{out_dir}.{n}'
