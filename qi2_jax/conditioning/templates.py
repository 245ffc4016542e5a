# SPDX-License-Identifier: Apache-2.0
"""Prompt templates of Qwen-Image-2.1, as raw strings.

Strings are tokenized as they stand: a chat-template render would tokenize
differently. The system turn's tokens are dropped after encoding.
"""

SYSTEM = (
  "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
)
HEADER = "<|im_start|>user\n"
FOOTER = "<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<image{number}><|vision_start|><|image_pad|><|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
# Renders messages of the public chat form like the strings above; for the
# processor of an exported built-in encoder.
CHAT = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n"
  "{% if message.content is string %}{{ message.content }}{% else %}"
  "{% for part in message.content %}{% if part.type == 'image' %}"
  "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}"
  "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = (
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  IMAGE_PAD,
)


def clean(prompt: str) -> str:
  """The prompt without special tokens; an empty one becomes one space.

  A caption scraped with a template in it must not open turns or claim image
  slots.
  """
  for token in SPECIAL_TOKENS:
    prompt = prompt.replace(token, "")
  return prompt or " "


def render(prompt: str, num_references: int = 0) -> str:
  """The full prompt, with one `<|image_pad|>` per reference image.

  References come first, `<image1>...` upwards, joined by spaces and followed
  directly by the cleaned prompt.
  """
  images = " ".join(IMAGE.format(number=i + 1) for i in range(num_references))
  return f"{SYSTEM}{HEADER}{images}{clean(prompt)}{FOOTER}"
