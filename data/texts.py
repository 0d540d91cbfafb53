"""
Text dialogues in: the forms that corpora come in, and what of a text can be spoken.

    alpaca.json ─ rows ─ read_row ─► [(speaker, text)] ─ pairs ─► [(question, answer)] ─ speakable ─► texts

A file holds JSON or JSON lines in the form of Alpaca, BELLE, MOSS, UltraChat, ShareGPT, OpenAI, OASST or
LCCC, recognised by its content. data/simulate.py speaks what comes out, and prints the counts with --check.
"""
import gzip
import html
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from common.files import some
from data.recordings import lines_of, read_all
from data.tts import HAN
from flatten import ROLES


def language(text):
    return 'zh' if re.search(f'[{HAN}]', text) else 'en'


# ------------------------------------------------------------------------------------------------------------
# files -> dialogues

FORMS = 'Alpaca, BELLE, MOSS, UltraChat, ShareGPT, OpenAI, OASST and LCCC'
SPEAKERS = dict(human='user', user='user', prompter='user', gpt='assistant', assistant='assistant',
                chatgpt='assistant', bard='assistant', bing='assistant', system='system', developer='system')
TOOLS = ('tool', 'tool_call', 'tool_response', 'function', 'function_call', 'observation', 'ipython')


class Unspoken(NamedTuple):
    """Stands in a turn for what nobody can say."""
    reason: str         # 'tool', 'no text' or 'speaker'
    what: str           # to be shown by --examples


def is_list_of_lists(part):
    return isinstance(part, list) and all(isinstance(row, list) for row in part)


def rows(path):
    """The rows of a JSON file (a list, or LCCC's object of lists) or of JSON lines, gzipped or not. Which of
    them it is, its content says, not its name."""
    number = 0
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rt', encoding='utf-8-sig') as file:
            lines = enumerate(lines_of(file, path), 1)
            number, first = next(((number, line) for number, line in lines if line.strip()), (0, ''))
            try:
                content = json.loads(first)
            except json.JSONDecodeError:        # one object over many lines
                file.seek(0)
                number = 0
                content = json.loads(read_all(file, path))
            if isinstance(content, dict) and all(map(is_list_of_lists, content.values())):
                content = [row for part in content.values() for row in part]
            if isinstance(content, list) and not all(isinstance(part, str) for part in content):
                yield from content
            else:
                yield content
                for number, line in lines:      # noqa: B007, the message has it
                    if line.strip():
                        yield json.loads(line)
    except FileNotFoundError:
        raise ValueError(f'no file {path}') from None
    except (EOFError, zlib.error) as error:
        raise ValueError(f'{path} is no whole gzip file ({error})') from None
    except OSError as error:
        raise ValueError(f'{path}: {error.strerror or error}') from None
    except (ValueError, RecursionError) as error:
        # json's, UTF-8's, Python's for a number of over 4,300 digits; or that a line is too long
        if type(error) is ValueError and str(error).startswith(path):
            raise
        if isinstance(error, UnicodeDecodeError) or '\0' in getattr(error, 'doc', ''):
            raise ValueError(f'{path} is no text; JSON or JSON lines in UTF-8 are expected, '
                             'gzipped as .gz or not') from None
        line = number or getattr(error, 'lineno', 1)
        raise ValueError(f'{path}, line {line}: neither JSON, one list or object, nor JSON lines, an object '
                         f'a line ({getattr(error, "msg", error)})') from None


def read_row(row):
    """A row of any of the forms -> [(speaker, text)]; an Unspoken may stand for a text, None for an empty
    one. Raises ValueError where it is none of them."""
    if isinstance(row, list):           # LCCC: the first speaker is the user; a space between characters
        return [(ROLES[i % 2], join_characters(text)) for i, text in enumerate(row)]
    if not isinstance(row, dict):
        raise ValueError(f'it is neither an object nor a list, but {row!r:.40}')
    if isinstance(row.get('chat'), dict):
        return read_moss(row['chat'])
    if 'plain_text' in row:
        return split_speakers(row['plain_text'], r'\[(Human|MOSS)\]:')
    if 'conversations' in row or 'messages' in row:
        return [read_message(each) for each in row.get('conversations') or row.get('messages') or []]
    if isinstance(row.get('data'), list):                       # UltraChat
        return [(ROLES[i % 2], text) for i, text in enumerate(row['data'])]
    if 'instruction' in row and 'output' in row:    # Alpaca, and BELLE, whose history is in the instruction
        if re.search(r'^\s*Human[:：]', row['instruction']) and 'Assistant' in row['instruction']:
            said = split_speakers(row['instruction'], r'(?:^|\n)[^\S\n]*(Human|Assistant)[:：]')
            return [turn for turn in said if turn[1]] + [('assistant', row['output'])]
        return [('user', f'{row["instruction"]}\n{row.get("input") or ""}'), ('assistant', row['output'])]
    if 'question' in row and 'std_answer' in row:               # BELLE's evaluation set
        return [('user', row['question']), ('assistant', row['std_answer'])]
    if isinstance(row.get('prompt'), dict):                     # OASST: of every reply the best ranked
        node, said = row['prompt'], []
        while node and node.get('lang', 'en') in ('en', 'zh'):
            said.append((SPEAKERS[node['role']], node['text']))
            replies = [reply for reply in node.get('replies', ())
                       if not reply.get('deleted') and reply.get('review_result') is not False]
            ranks = [(reply.get('rank') is None, reply.get('rank')) for reply in replies]
            node = replies[ranks.index(min(ranks))] if replies else None
        return said
    raise ValueError(f'it has the fields {some(row)}')


def read_moss(chat):
    """<|Human|>: … <eoh>. Thoughts are left out; what the tools were asked and what they answered is None
    where none was used."""
    def unmark(text):
        return re.sub(r'^\s*<\|\w+\|>:|<eo\w>\s*$', '', text).strip()

    said = []
    for _, turn in sorted(chat.items(), key=lambda turn: int(turn[0].rpartition('_')[2])):
        used = [unmark(turn.get(key) or '') for key in ('Commands', 'Tool Responses')]
        used = [text for text in used if text not in ('', 'None')]
        answer = Unspoken('tool', used[0]) if used else unmark(turn['MOSS'])
        said += [('user', unmark(turn['Human'])), ('assistant', answer)]
    return said


def read_message(message):
    """A message of ShareGPT, LLaMA-Factory or OpenAI -> (speaker, text). What a tool is asked and answers
    belongs to the assistant's turn."""
    name = str(message.get('from', message.get('role')))
    calls = message.get('tool_calls') or message.get('function_call')
    if not calls and not {'value', 'content'} & message.keys():
        raise ValueError(f'a message has the fields {some(message)}, neither value nor content')
    content = message.get('value', message.get('content'))
    if calls or name in TOOLS:
        return 'assistant', Unspoken('tool', str(calls or content))
    if name not in SPEAKERS:
        return 'user', Unspoken('speaker', name)
    parts = content if isinstance(content, list) else [content]
    return SPEAKERS[name], join([read_part(part) for part in parts])


def read_part(part):
    """A string, {"type": "text", "text": …}, or what cannot be said: a picture, a sound, a tool"""
    text = part.get('text') if isinstance(part, dict) else part
    if isinstance(part, dict) and not isinstance(text, str):
        is_tool = re.search('tool|function', str(part.get('type')))
        return Unspoken('tool' if is_tool else 'no text', str(part))
    if isinstance(text, str) and (mark := re.search('<(image|audio|video)>', text)):     # LLaMA-Factory's
        return Unspoken('no text', mark.group())
    return text


def join(texts):
    """Texts of one turn -> its text, or the Unspoken among them. Raises ValueError for anything else."""
    for text in texts:
        if isinstance(text, Unspoken):
            return text
        if not isinstance(text, str | None):
            raise ValueError(f'somebody says {text!r:.40}, which is no text')
    return '\n'.join(text or '' for text in texts)


def join_characters(text):
    text = ' '.join(text.split())
    if re.search(r'[A-Za-z0-9]{2}', text):      # words are whole: only what is not Latin was taken apart
        return re.sub(r'(?<=[^\x00-\x7f])\s+|\s+(?=[^\x00-\x7f])', '', text)
    return ''.join(text.split())


def split_speakers(text, marks):
    """A dialogue in one string -> [(speaker, text)]; what stands before the first speaker is left out."""
    parts = re.split(marks, text)[1:]
    return [('user' if name == 'Human' else 'assistant', re.sub(r'<eo\w>$', '', said.rstrip()))
            for name, said in zip(parts[::2], parts[1::2])]


def pairs(said):
    """[(speaker, text)] -> [(user's text, assistant's text)], as many as follow each other. What a system
    says, and an assistant before anybody asked, is left out; a speaker who goes on is one turn."""
    turns = []
    for speaker, text in said:
        if speaker == 'system' or (speaker == 'assistant' and not turns):
            continue
        if turns and turns[-1][0] == speaker:
            turns[-1] = speaker, join([turns[-1][1], text])
        else:
            turns.append((speaker, join([text])))
    texts = [text for _, text in turns]
    if texts and isinstance(texts[-1], Unspoken):
        texts.append('')        # it is counted, though nobody answers it
    return list(zip(texts[::2], texts[1::2]))


# ------------------------------------------------------------------------------------------------------------
# what can be spoken

LETTERS_A_WORD = 50     # a text of more is too long, and not searched: some patterns take a second for more
# the first that is found in a turn, line by line; (?m): ^ and $ are those of a line
REASONS = {
    'code': r'(?m)```|\w\(\)|\w\.\w+\(|[{}]|\w;\s*$|=>|->|[!=]=|\+=|::'
            r'|//(?!\w+\.)|[A-Za-z0-9]_[A-Za-z0-9]|<\?|#include|^[ \t]*(?:import|package) [\w.]+;?$'
            r'|^[ \t]*(?:from [\w.]+ import|def \w+\(|class \w+[:(]'
            r'|(?:public|private|const|let|var|function) \w+)'
            r'|print\s*\(|(?i:\bselect\b.+\bfrom\b.+\bwhere\b)',
    'table': r'(?m)\|.*\||^.*\S\t+\S.*\n.*\S\t+\S|\+-{3,}',
    'url': r'(?i)https?:|www\.|[\w.-]@[\w-]+\.\w|\w-*\.(?:com|org|net|edu|gov|io|cn)\b',
    'markup': r'(?m)^[ \t]*#|^[ \t]*[-*•·●▪◦■○–—>]+\s|</?\w[^<>]*>|[][]|\*\*|__|&\w+;'
              r'|^[ \t]*(?:-{3,}|\*{3,})\s*$',
    'list': r'(?m)^[ \t]*\d{1,2}\s*[.)、．）:：]\s*[^\d\s]'
            r'|^[ \t]*[(（]\d{1,2}[)）]|[①②③]'
            r'|^[ \t]*[A-Da-d一二三四五六七八九十][.)、．）]'
            r'|(?s:(?<!\d)1\s*[.)、．）]\s*[^\d\s].*(?<!\d)2\s*[.)、．）]\s*[^\d\s])'
            r'|(?s:\bA\s*[.)、．）:：].*\bB\s*[.)、．）:：])',
    'formula': r'[\\^<>=√∑∫∞≈≠≤≥×÷∂∆∏∈∪∩∀∃²³½¼¾₀-₉⁰-⁹]|\$[^\s\d][^$]*\$'
               r'|\d\s*[+*＋]\s*\d|\d\s+[-−–/]\s+\d|\b[a-z]\(\w\)',
}
ALL_REASONS = (*REASONS, 'script', 'symbols', 'long', 'tool', 'no text', 'speaker', 'empty', 'no pair')
SENTENCE_END = '.!?…:;,。！？；：，、—"”’\')）'
# the ordinary punctuation of both languages; what is neither this, a letter nor a digit is a rare symbol
PUNCTUATION = set(' .,;:!?\'"()-/%&$+~—–…‘’“”·°€£¥，。！？、；：（）《》〈〉「」『』【】～〜％￥℃‰')


def n_words(text):
    """Chinese characters, and words of anything else: one count for both languages and their mixture."""
    return len(re.findall(rf'[{HAN}]|[^\W{HAN}]+(?:[\'’-][^\W{HAN}]+)*', text))


def speakable(text, max_words=200, max_symbols=0.05):
    """-> (the text as it is said, None), or (the text, the reason why it cannot be said). Emphasis is taken
    off words, lines become sentences; a few rare symbols (an emoji) are left out, they are not heard."""
    if len(text) > LETTERS_A_WORD * max_words:
        return text, 'long'
    text = unicodedata.normalize('NFC', html.unescape(text))
    text = re.sub(r'\r\n|\\n(?![a-z])', '\n', text).strip()        # BELLE has some escaped twice
    text = re.sub('[０-９Ａ-Ｚａ-ｚ]+', lambda wide: unicodedata.normalize('NFKC', wide.group()), text)
    text = ''.join(c for c in text if c in '\n\t' or unicodedata.category(c) not in ('Cc', 'Cf'))
    text = re.sub('[^\\S\n\t]', ' ', text)
    text = re.sub(r'(\*\*|__|(?<!\w)[*_`])(?=\S)([^*_`\n]+)(?<=\S)\1', r'\2', text)
    for reason, pattern in REASONS.items():
        if re.search(pattern, text):
            return text, reason
    said = ''
    for line in (' '.join(line.split()) for line in text.split('\n')):
        if said and line and said[-1] not in SENTENCE_END and not (line[0].islower() and said[-1].isascii()):
            said += '。' if language(said[-1]) == 'zh' else '.'
        said += ' ' * bool(said and line and ord(max(said[-1], line[0])) < 0x3000) + line
    strange = [c for c in said if not c.isalnum() and c not in PUNCTUATION]
    if any(c.isalpha() and not unicodedata.name(c, '').startswith(('LATIN', 'CJK UNIFIED')) for c in said):
        return said, 'script'
    is_number_sign = any(c.isnumeric() and not c.isdecimal() and not c.isalpha() for c in said)     # ½, ②
    if is_number_sign or len(strange) > max_symbols * len(said.replace(' ', '')):
        return said, 'symbols'
    said = ' '.join(''.join(c for c in said if c not in strange).split())
    n = n_words(said)
    return said, 'empty' if n == 0 else 'long' if n > max_words else None


def collect(paths, args):
    """
    Reads and filters the files of text dialogues. args: max_words, max_symbols, see speakable
    -> items    {id: [user's text, assistant's text, user's …]}
       table    {file: Counter}
       notes    on each dialogue: (id, reason or None, the texts kept, the text that ended it)
    """
    items, table, notes = {}, {}, []
    for path in paths:
        name = re.sub(r'(\.jsonl?)?(\.gz)?$', '', os.path.basename(path))
        if name in table:
            raise ValueError(f'two files are called {name}; rename {path}, '
                             'as the ids of its dialogues start with its name')
        counts = table[name] = Counter()
        for number, row in enumerate(rows(path)):
            try:
                said = pairs(read_row(row))
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                why = error if isinstance(error, ValueError) else repr(error)
                raise ValueError(f'{path}, row {number + 1} is in no form that is known ({FORMS}): '
                                 f'{why}') from None
            kept, reason, last = keep(said, args.max_words, args.max_symbols)
            id = f'{name}-{number:06d}'
            counts['dialogues'] += 1
            counts['turns'] += len(kept)
            counts[('part' if reason else 'whole') if kept else reason] += 1
            notes.append((id, reason, kept, last))
            if kept:
                items[id] = kept
        if counts['dialogues'] and counts['speaker'] == counts['dialogues']:
            strange = {what: None for _, _, _, what in notes[-counts['dialogues']:]}
            raise ValueError(f'{path}, row 1 is in no form that is known ({FORMS}), nor is any other: '
                             f'the speakers are {some(strange)}, those that are known {some(SPEAKERS)}')
    return items, table, notes


def keep(said, max_words, max_symbols):
    """[(question, answer)] -> the texts before the first that cannot be spoken; why it cannot; that text"""
    kept = []
    for pair in said:
        spoken = [(text.what, text.reason) if isinstance(text, Unspoken)
                  else speakable(text, max_words, max_symbols) for text in pair]
        for text, reason in spoken:
            if reason:
                return kept, reason, text
        kept += [text for text, _ in spoken]
    return kept, None if said else 'no pair', ''


def print_table(table, notes, n_example, seed):
    columns = ['dialogues', 'whole', 'part', *ALL_REASONS, 'turns']
    margin = max(len(name) for name in [*table, 'all'])
    print(' ' * margin, *(f'{column:>9}' for column in columns))
    for name, counts in [*table.items(), ('all', sum(table.values(), Counter()))]:
        print(f'{name:{margin}}', *(f'{counts[column]:9}' for column in columns))
    order = np.random.default_rng(seed).permutation(len(notes))
    for is_kept in (True, False):
        for i in [i for i in order if bool(notes[i][2]) == is_kept][:n_example]:
            id, reason, kept, last = notes[i]
            why = f'; {reason}: {last[:300]!r}' if reason else ''
            print(f'\n{id}  ' + (f'kept, {len(kept)} turns' if is_kept else 'dropped') + why)
            print(*(f'    {role:9}  {text}' for role, text in zip(ROLES * len(kept), kept)), sep='\n',
                  end='\n' * is_kept)
