"""The model families of this project, for SGLANG_EXTERNAL_MODEL_PACKAGE.

SGLang 0.5.23 imports all of its 200 model files before it looks for one, which takes 3 s, unless this variable names
a package that holds the model. An architecture that is not here is found by SGLang's own search.
"""
