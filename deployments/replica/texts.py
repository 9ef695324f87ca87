"""Texts of odd kinds, which a model has to read like any others."""

TEXTS = {
    "a word": "embedding",
    "a sentence": "The quick brown fox jumps over the lazy dog.",
    "capitals": "NATO AND UNESCO MET IN PARIS",
    "accents": "Crème brûlée à la façon de Noël, naïve Übermut",
    "German": "Der Bundestag hat am Donnerstag über den Haushalt beraten.",
    "Chinese and Japanese": "北京是中国的首都。東京は日本の首都です。",
    "Arabic and Russian": "مرحبا بالعالم. Москва слезам не верит.",
    "emoji": "Great job 👍🏽🎉 see you 👩‍👩‍👧",
    "numbers and signs": "3.14159, 1,000,000 €; 50 % @ #7 (a+b)^2 = c_1",
    "code": "def f(x):\n\treturn {'a': [x ** 2 for _ in range(10)]}\n",
    "spaces": "  two  spaces\t\ttabs\n\n\nlines  ",
    "special tokens": "[CLS] a [MASK] b </s> <s> [SEP] c <|endoftext|>",
    "as long as it takes, and longer": "It was the best of times, it was the worst of times. " * 2000,
}
