"""Chat in the terminal with a routed model; after every answer: what ran, and with --compare the time saved.

    python entrypoints/demo/chat.py --run trained_models/tiny-llama-mod/... --compare
    python entrypoints/demo/chat.py --model exports/tiny
Commands: /dial 0.8 (share of the decoder that runs), /dial own (as trained), /compare, /reset, /help, /quit.
"""

from __future__ import annotations

import argparse

from transformers import TextStreamer

from router_tuning.checkpoint.loading import add_arguments, opened
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.model import set_thresholds
from router_tuning.model.saving import read_router_config, thresholds_for
from router_tuning.viewer.chatting import answer

HELP = __doc__.strip().splitlines()[-1]


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    add_arguments(parser, export=True, dial=["flops"])
    parser.add_argument("--compare", action="store_true", help="generate densely as well and show the time saved")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=128)
    return parser.parse_args()


class Chat:
    """The conversation so far, and the settings that commands change."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.tokenizer, _, self.folder = opened(args, capacity=None)
        self.own = self.model.config.mod_threshold
        self.compare, self.limit = args.compare, args.max_new_tokens
        self.start = [{"role": "system", "content": args.system}] if args.system else []
        self.messages = list(self.start)
        if args.flops is not None:
            self.turn(str(args.flops))

    def turn(self, value: str) -> str:
        """``/dial``: thresholds for a share of the decoder's operations from the stored dial, or the trained ones."""
        if value == "own":
            set_thresholds(self.model, self.own)
            return "trained thresholds"
        try:
            share = float(value)
        except ValueError:
            raise UserError(f"/dial {value}: a number from 0 to 1, or own") from None
        set_thresholds(self.model, thresholds_for(read_router_config(self.folder), share, self.folder, "flops"))
        return f"dial at {share:g}, on average over text like that it was calibrated on"

    def command(self, line: str) -> str:
        """Carry out a ``/command`` and say what changed."""
        name, _, value = line.partition(" ")
        if name == "/dial":
            return self.turn(value.strip())
        if name == "/compare":
            self.compare = not self.compare
            return f"dense comparison {'on' if self.compare else 'off'}"
        if name == "/reset":
            self.messages = list(self.start)
            return "new conversation"
        return HELP

    def say(self, text: str) -> str:
        """Answer one turn, streaming it to the terminal; returns the line about depth and time."""
        self.messages.append({"role": "user", "content": text})
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            found = answer(self.model, self.tokenizer, self.messages, self.limit, streamer, self.compare)
        except UserError as error:
            self.messages.pop()
            raise UserError(f"{error}; /reset starts anew") from None
        self.messages.append({"role": "assistant", "content": found.text})
        return found.summary()


def main() -> None:
    chat = Chat(parse_args())
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            print(chat.command(line) if line.startswith("/") else f"[{chat.say(line)}]")
        except UserError as error:
            print(f"({error})")


if __name__ == "__main__":
    cli(main)
