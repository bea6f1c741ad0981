"""Drafting of a recipe: `survey` looks at files, `sources` groups them, `sizes` chooses sizes, `draft` writes.

Nothing is asked: every choice has a rule, and the recipe's comments state the rule and the figures.
"""
