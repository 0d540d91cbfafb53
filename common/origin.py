"""What made a result: the command, the commit, the machine and the versions."""
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VERSIONS = ('torch', 'numpy', 'tiktoken', 'safetensors', 'pyarrow', 'triton', 'transformers', 'accelerate',
            'trl', 'liger-kernel', 'vllm')


def describe_run():
    """-> dict(command, date, commit, uncommitted, machine, versions), for the head of a result file"""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version for name, version in installed_versions().items() if name in VERSIONS}
    return dict(
        command=' '.join(['python', os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        date=time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime()),
        commit=git('rev-parse', 'HEAD') or None,
        uncommitted=bool(git('status', '--porcelain', '-uno')),
        machine=dict(cpu=cpu_name(), cores=os.cpu_count(), gpu=gpu, system=platform.platform()),
        versions=dict(python=platform.python_version(), **versions))


def git(*words):
    """What git prints of this code; '' where there is no git, or the code is no clone."""
    if not shutil.which('git'):
        return ''
    return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def installed_versions():
    there = importlib.metadata.distributions()
    return {dist.metadata['Name'].replace('_', '-'): dist.version for dist in there}


def cpu_name():
    with open('/proc/cpuinfo' if os.path.exists('/proc/cpuinfo') else os.devnull) as file:
        names = [line.split(': ')[1].strip() for line in file if line.startswith('model name')]
    return names[0] if names else platform.machine()
