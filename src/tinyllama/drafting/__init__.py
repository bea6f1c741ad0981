"""Drafting of a recipe: `survey` looks at files, `sources` groups them, `sizes` chooses sizes, `draft` writes.

Every choice follows a rule, without questions to the user. The recipe's comments state the rules and the figures.
"""
