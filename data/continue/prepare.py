"""
What users say gets continuations, for BLSP (arXiv:2309.00916): a language model reads it and goes on. A
speech model that learns to write the same after hearing it behaves after speech as the LLM does after text.

    user        ▓ what is the capital of france? ▓
    assistant                                     │ and why is it paris? … (text alone)

    python data/continue/prepare.py data/libri --llm=models/Qwen2-7B-Instruct --out=data/libri_continue

Each turn of the user in a data folder becomes a record: its codes, no codes of the assistant, and behind it a
turn of the assistant that lasts no frame (it starts and ends at the length of the user's channel). The prompt
of the record is the instruction, as BLSP trains with it. The record has its dialogue's split, and its id or,
where the user has several turns there, id-1, id-2, … by start.

The LLM, any causal one of transformers, writes the likeliest token each time. It is asked in its chat
template or, where it has none, as in BLSP:    ###[Human]:INSTRUCTION TEXT⏎⏎⏎###[Assistant]:

The command runs alone or under torchrun, and goes on where it was killed (data/tokenise.py). In float32 a
batch gives what its rows give alone; in bfloat16, rounding may decide between two tokens of like probability.
"""
import argparse
import glob
import hashlib
import json
import os

import torch
from safetensors import SafetensorError

from codec import load_codec
from common.device import pick_device, pick_dtype
from common.levels import codes_per_frame
from config import Parser
from data.dialogues import Dialogues, save_table, to_table
from data.recordings import by_id
from data.tokenise import add_remarks, finish, is_prepared, work_on_parts
from flatten import check

# of BLSP (github.com/cwang621/blsp at f7bf52f), as are the defaults below
INSTRUCTION = 'Continue the following text in a coherent and engaging style with less than 40 words.'


class Source:
    """The user's turns in a data folder. items: {id of a turn: (split, number of the dialogue, of the turn)};
    digest: of what is said, and when."""

    def __init__(self, folder):
        self.dialogues = {}
        for split in ('train', 'val', 'test'):
            if split == 'train' or glob.glob(os.path.join(glob.escape(folder), f'{split}*.arrow')):
                self.dialogues[split] = Dialogues(folder, split)
        self.digest = hashlib.sha256()
        self.items = by_id(self.list_items())
        for dialogues in self.dialogues.values():
            dialogues.with_words = True         # to look through all was faster without
        if not self.items:
            raise ValueError(f'there is nothing to continue: no user speaks in {folder}')

    def list_items(self):
        for split, dialogues in self.dialogues.items():
            for i in range(len(dialogues)):
                id, turns = dialogues[i]['id'], dialogues[i]['turns']
                spoken = [(turn['start'], n) for n, turn in enumerate(turns)
                          if turn['role'] == 'user' and turn['start'] < turn['end']]
                for k, (start, n) in enumerate(sorted(spoken), 1):
                    what = [split, id, start, turns[n]['end'], turns[n]['text']]
                    self.digest.update(json.dumps(what).encode())
                    yield id if len(spoken) == 1 else f'{id}-{k}', (split, i, n)

    def record(self, id):
        """-> dict(id, user, assistant, turns), still without a continuation"""
        split, i, n = self.items[id]
        dialogue = self.dialogues[split][i]
        turn = dialogue['turns'][n]
        start, end = turn['start'], turn['end']
        words = [dict(word, start=word['start'] - start, end=word['end'] - start)
                 for word in turn.get('words') or []]
        turn = dict(turn, start=0, end=end - start, words=words)
        return dict(id=id, user=dialogue['user'][start:end], assistant=[], turns=[turn])


class LLM:
    """A causal language model. Raises ValueError if the folder holds none, or only a part of one."""

    def __init__(self, folder, device, dtype):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        except ModuleNotFoundError as error:
            raise ValueError(f'a language model needs {error.name}: pip install transformers') from None
        if not os.path.isfile(os.path.join(folder, 'config.json')):
            raise ValueError(f'no language model in {folder}: it has no config.json; --llm is a folder with '
                             'all files of a causal one, such as Qwen/Qwen2-7B-Instruct')
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model, found = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f'no complete causal language model in {folder}: {reason}') from None
        # transformers makes up what is not there: random weights, a tokenizer without tokens
        missing = sorted(found['missing_keys']) + ['tokenizer'] * (not self.tokenizer('a')['input_ids'])
        if missing:
            raise ValueError(f'no complete causal language model in {folder}: it has no {missing[0]}')
        self.model.to(device).eval()
        # any special token is an end: a base model in a chat template goes on with the user's next message
        own = self.model.generation_config.eos_token_id     # a list, a number or None
        own = own if isinstance(own, list) else [own]
        self.ends = sorted({*own, *self.tokenizer.all_special_ids} - {None})
        # its own settings may have a penalty on repeated tokens, which would count those of the padding
        self.pad = min(self.ends, default=0)
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.ends or None, pad_token_id=self.pad)

    def prompt(self, instruction, text):
        """-> ids of what it is asked"""
        asked = f'{instruction} {text}'
        if not self.tokenizer.chat_template:
            return self.tokenizer(f'###[Human]:{asked}\n\n\n###[Assistant]:')['input_ids']
        chat = [dict(role='user', content=asked)]       # Qwen3 would think, until its tokens are used up
        asked = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True,
                                                   enable_thinking=False)
        return self.tokenizer(asked, add_special_tokens=False)['input_ids']

    @torch.inference_mode()
    def go_on(self, prompts, max_new_tokens):
        """[ids] -> [(text, was it cut off)], in one batch"""
        n, found = max(map(len, prompts)), []
        ids = [[self.pad] * (n - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (n - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids, mask = torch.tensor([ids, mask], device=self.model.device)
        rows = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)
        for row in rows[:, n:].tolist():
            end = next((at for at, id in enumerate(row) if id in self.ends), None)
            # a model that was not trained on this form may write the next question, too
            text, *more = self.tokenizer.decode(row[:end], skip_special_tokens=True).split('###[', 1)
            found.append((' '.join(text.split()), end is None and not more))
        return found


def make_part(path, ids, source, llm, codec, args):
    """Writes a part -> the seconds of its turns"""
    records, reasons, remarks = {id: source.record(id) for id in ids}, {}, {}
    texts = {id: record['turns'][0]['text'].strip() for id, record in records.items()}
    prompts = {id: llm.prompt(args.instruction, text) for id, text in texts.items()}
    for id in ids:
        if not texts[id]:
            reasons[id] = 'what the user says is not written down'
        elif len(prompts[id]) >= args.max_prompt_tokens:
            reasons[id] = f'its prompt of {len(prompts[id])} tokens reaches --max_prompt_tokens'
    order = sorted((id for id in ids if id not in reasons), key=lambda id: len(prompts[id]), reverse=True)
    for at in range(0, len(order), args.batch_size):
        batch = order[at:at + args.batch_size]
        for id, (text, is_cut) in zip(batch, llm.go_on([prompts[id] for id in batch], args.max_new_tokens)):
            n_frame = len(records[id]['user'])
            turn = dict(role='assistant', start=n_frame, end=n_frame, text=text, words=[])
            records[id]['turns'].append(turn)
            records[id]['prompt'] = args.instruction
            check(records[id], codec.n_codes, codes_per_frame(codec.describe()))
            if not text:
                reasons[id] = 'its continuation is empty'
            elif is_cut:
                add_remarks(remarks, {'the continuation is cut off at --max_new_tokens': (1, id)})
    rows = [records[id] for id in ids if id not in reasons]
    skipped = [dict(id=id, reason=reasons[id]) for id in ids if id in reasons]
    table = to_table(rows, codec.describe())
    save_table(path, table, codec.describe(), skipped=skipped, lost_turns=0, remarks=remarks)
    return sum(len(row['user']) for row in rows) / codec.rate_hz


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('data', help='data folder to read; its codec and tokenizer are taken along')
    add('--llm', required=True, help='folder of a causal language model, as transformers reads it')
    add('--out', required=True, help='data folder to write')
    add('--instruction', default=INSTRUCTION, help=f'stands before what the user says ({INSTRUCTION})')
    add('--max_new_tokens', type=int, default=64, help='a continuation is cut off there (64)')
    add('--max_prompt_tokens', type=int, default=192, help='a prompt of so many is too long (192)')
    add('--batch_size', type=int, default=32, help='turns that the LLM continues at once (32)')
    add('--part', type=int, default=256, help='turns a part: what a kill can cost (256)')
    add('--device', default='auto', help='for the LLM')
    add('--dtype', default='auto', choices=('auto', 'bfloat16', 'float16', 'float32'), help='of the LLM')
    args = parser.parse_args()
    if min(args.max_new_tokens, args.max_prompt_tokens, args.batch_size, args.part) < 1:
        raise ValueError('--max_new_tokens, --max_prompt_tokens, --batch_size and --part have to be above 0')
    if os.path.realpath(args.out) == os.path.realpath(args.data):
        raise ValueError(f'--out={args.out} is the folder that is read; choose another')
    source, codec = Source(args.data), load_codec(args.data)
    if any(found.codec != codec.describe() for found in source.dialogues.values()):
        raise ValueError(f'{args.data} was made with another codec than it holds; prepare it again')
    ids = list(source.items)
    parts = [ids[at:at + args.part] for at in range(0, len(ids), args.part)]
    recipe = {key: getattr(args, key) for key in (
        'llm', 'instruction', 'max_new_tokens', 'max_prompt_tokens', 'dtype', 'part')}
    recipe |= dict(codec=codec.describe(), n_item=len(ids), turns=source.digest.hexdigest()[:16])
    if is_prepared(os.path.join(args.out, 'prepared.json'), recipe):
        return print(f'{args.out} is prepared already')
    device = pick_device(args.device)
    if device.type == 'cuda':       # under torchrun each process has its own
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', device.index)))
    llm = LLM(args.llm, device, pick_dtype(args.dtype, device))
    tokenizer = os.path.join(args.data, 'tokenizer')
    args.codec, args.tokenizer = args.data, tokenizer if os.path.isdir(tokenizer) else None
    splits = {id: split for id, (split, _, _) in source.items.items()}
    work_on_parts(args.out, recipe, len(parts),
                  lambda number, path: make_part(path, parts[number], source, llm, codec, args),
                  lambda: finish(args, recipe, codec, ids, len(parts), splits))


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
