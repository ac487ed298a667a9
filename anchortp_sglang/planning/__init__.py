"""Plans which device holds which part of a model, and what must move when that changes. Pure: values in, values out."""
