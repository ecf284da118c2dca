"""An export behind HTTP, and a question to it. The server needs torch and transformers alone, not this repository.

python examples/serve_export.py                  # of the embedded base, with routers that are not tuned
python examples/serve_export.py exports/tiny     # of a run, see entrypoints/checkpoint/export.py
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.request import Request, urlopen

from transformers import AutoModelForCausalLM, AutoTokenizer


def made() -> Path:
    """A small export, where none is named."""
    from router_tuning.checkpoint.exporting import export
    from router_tuning.embedded import TINY_LLAMA
    from router_tuning.model import route, save_routers, unroute

    model = unroute(AutoModelForCausalLM.from_pretrained(TINY_LLAMA))
    save_routers(route(model, mod_n=6, granularity="attn_token"), "run")
    export(Path("run"), TINY_LLAMA, Path("export"), overwrite=True)
    return Path("export")


folder = sys.argv[1] if len(sys.argv) > 1 else made()
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer, one_at_a_time = AutoTokenizer.from_pretrained(folder), Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
        with one_at_a_time:
            output = model.generate(**inputs, do_sample=False, max_new_tokens=asked.get("max_tokens", 64))
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
Thread(target=server.serve_forever, daemon=True).start()
question = {"messages": [{"role": "user", "content": "Reverse the text.\nInput: KIBHG"}], "max_tokens": 16}
request = Request(f"http://127.0.0.1:{server.server_port}/v1/chat/completions", json.dumps(question).encode())
print(json.load(urlopen(request))["choices"][0]["message"]["content"])
server.shutdown()
