"""The fault harness: scripted worlds in processes of their own, faults injected into real gateways, and a checker.

Every promise of the product is a module with `async def run(plan) -> Report`; `python -m tests.faults` lists them.
"""
