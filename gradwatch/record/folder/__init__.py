"""The run folder: a run on disk, in formats that every data tool can read.

::

    runs/a/
      meta.json                                  the layout of the model; for each session, the
                                                 versions, optimizers, their groups and options
      steps/0001-0000000000-0000000063.parquet   one row per optimizer step
      parameters/0001-0000000000-0000000063.parquet   one row per step and parameter
      events/0001.jsonl                          one line of JSON per event
      ranks/1.jsonl                              where another rank made a NaN (see ``ranks.py``)
      nonfinite/step-000120/                     what made a NaN (see ``explanations.py``)
      .lock                                      only while a process writes: names that process

Each process that writes to the folder is a *session*. A *row* is one step of a session, counted
from 0. A *part* is one Parquet file; its name gives the session and the first and last row. A part
is written under a temporary name, synced to disk, renamed and never changed in place afterwards, so
a process that is killed at any moment leaves only complete parts. Each batch of steps is written in
this order: events, parameters, steps. :func:`gradwatch.load` ignores everything whose row is not in
``steps/`` yet; the ``row`` of an event is the one that it waits for.

*Merging*: the merged part is written first, and then the small parts are removed. A reader skips a
part whose rows another part covers, and lists a folder until two listings agree, so it sees each
row once. Other tools may briefly see rows twice; ``docs/run-folder.md`` shows how to drop them.

*Resuming*: if a later session has steps of an optimizer, then steps of earlier sessions from that
session's first step on are void, and so are their events. Readers apply this rule as soon as the
first part of the later session appears. The session then rewrites the older parts without the void
rows, for tools that do not know the rule.

``steps/`` has the fields of :class:`~gradwatch.StepRecord` and ``row``. ``parameters/`` has:

===================== ================== ==========================================================
column                type               meaning
===================== ================== ==========================================================
``row``               int64              row of the step in this session
``step``              int64              optimizer step
``optimizer``         string             label of the optimizer
``parameter``         string             name; parameters without a gradient have no row
``grad_norm``         float32 (float64)  before the clip; float64 from the first norm that does not
                                         fit into a float32
``grad_norm_clipped`` the same           after the clip; null if it equals the magnitude of the
                                         step's ``clip_coef`` times ``grad_norm``, as it nearly
                                         always does
statistics            float64            as ``watch(statistics=)`` says; null if not measured
===================== ================== ==========================================================

The table is long, with one row per step and parameter instead of one column per parameter, for
three reasons: the files of two models have the same columns, any parameter name is just a value,
and 100,000 parameters are rows instead of 100,000 column headers in each part. Parts are sorted by
parameter name and then by row, so names and steps take almost no space: one step of one parameter
takes 3.1 bytes. To read the curve of one parameter, only the row groups are opened whose bounds (in
the statistics of the Parquet file) can contain its name.
"""
