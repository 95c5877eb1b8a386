"""Lines of Python that load a trained policy, for its card and its run's report."""

from __future__ import annotations

import json


def loading(name: str) -> str:
    """Loads a model and its tokenizer.

    Args:
        name: folder, or a name on the hub.
    """
    quoted = json.dumps(name, ensure_ascii=not name.isprintable())
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})"
    )


def sampling(prompt: str, tokens: int) -> str:
    """After `loading`: one sample at temperature 1, of all tokens, as an evaluation draws them.

    Args:
        prompt: the text.
        tokens: most of a sample.
    """
    return (
        f"prompt = tokenizer({prompt!r}, return_tensors='pt')\n"
        f"ids = model.generate(**prompt, do_sample=True, top_k=0, max_new_tokens={tokens})\n"
        "print(tokenizer.decode(ids[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))"
    )
