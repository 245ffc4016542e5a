# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "the user can fix this"."""


class InputError(ValueError):
  """Bad input; the message is one sentence naming the thing and the remedy.

  Entry points print the sentence without a traceback and exit with status 2.
  """
