"""What the benchmark scripts share: their options, and the load of the machine at the start."""
import argparse
import os
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def arguments(doc: str,  # of the script
              quick: str,  # what --quick measures
              argv=None,
              device: bool = False):  # has it --device?
    "The options of a script"
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true',
                        help=f'{quick}: seconds, and no meaningful figures')
    if device:
        parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--out', type=Path, help='folder for the record')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(),
                        help="PyTorch's threads")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f'--threads {args.threads}: expected at least 1')
    if device and args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch finds no such device')
    args.out = args.out or ROOT / ('runs/benchmarks-quick' if args.quick else 'benchmarks/results')
    return args


def load_at_start(args) -> float:
    "Sets the threads; the load of the machine, with a warning where it spoils the times"
    torch.set_num_threads(args.threads)
    load = (os.getloadavg() if hasattr(os, 'getloadavg') else [float('nan')])[0]
    if load > 0.5 and not args.quick:
        print(f'warning: load of the machine is {load:.1f}; times may be wrong', flush=True)
    return load
