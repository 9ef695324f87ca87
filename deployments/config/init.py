"""A model → its worker file: what `init` writes, and what serves a model that has none."""

import json
import re
from pathlib import Path

from deployments.config.model_files import ModelFiles, is_hub_id


def is_model(path: Path) -> bool:
    """Whether a path is a model's folder, or its id on a hub, in place of a worker file."""
    is_id = not path.exists() and path.suffix != ".toml" and is_hub_id(str(path))
    return is_id or (path / "config.json").is_file()


def worker_text(path: Path) -> str:
    """Return a model's worker file, with what its own files say. Raises FileNotFoundError or ValueError."""
    files = ModelFiles.read(path) if path.is_dir() else None
    model_path = str(path.resolve()) if files else str(path)
    name = re.sub(r"[^a-z0-9._-]+", "-", path.name.lower()).strip("-._") or "model"
    lines = ["edition = 1", "", "[generator]", 'type = "vllm"', f"model_path = {json.dumps(model_path)}"]
    if files is not None:
        engine, reason = files.engine(None)
        lines.append(f'# engine = "{engine}"  # chosen: {reason}')
        lines.append(f"# max_model_len = {files.max_model_len or '…'}  # tokens of an input; the model's own")
        if engine == "vllm":
            heads = files.num_attention_heads
            lines.append(f"tensor_parallel_size = 1  # GPUs or shares of cores; must divide {heads} heads")
        if files.supports_pipeline_parallel and engine == "vllm":
            lines.append(f"pipeline_parallel_size = 1  # stages of its {files.num_layers} layers")
    lines += ["", "[queue]", f'checkpoint_name = "{name}"', "version = 1"]
    lines += ["", f'[queue.models."{name}".embedding_task]', "supported = true"]
    if files is not None and files.prompts:
        lines.append(
            "# The model's own prompts, by `input_type`; `prompts = {…}` puts others in their place:"
        )
        lines += [
            f"#   {use} = {json.dumps(text, ensure_ascii=False)}" for use, text in files.prompts.items()
        ]
        default = json.dumps(files.default_prompt, ensure_ascii=False)
        lines += [f"# Where a request names none: {default}"] if files.default_prompt else []
    return "\n".join(lines) + "\n"
