# SPDX-License-Identifier: Apache-2.0
"""Images whose text is known exactly: rendered, composed, from templates.

The three strategies of text synthesis of the Qwen-Image report (arXiv
2508.02324, section 3.4), which the 2.0 report builds upon:

    pure       text on backgrounds                       (`pure`)
    composed   text on objects and in scenes             (`composed`)
    template   slides, posters, tables, pages ...        (`templates`)

A strategy is a function `draw(language, faces, size, rng, texts)` that gives a
`sample.Sample` or a `sample.Rejected`. Text that a font cannot draw exactly is
never drawn (`coverage`). `python -m data_pipelines.synthesis --help`.
"""
