import time
from latex2sympy2_extended.latex2sympy2 import latex2sympy
import sympy
L=[r'x_{2}(x_{3})', r'\sin(3x_{2})/5+x_{3}', r'\cos 2x_{12}', r'x_{2}x_{3}^{2}+x_{0}^{x_{1}x_{2}}', r'\exp{-x_{2}\cdot x_{3}}',r'\frac{1}{2}\left(x_{0}\right)', r'x_{2}(x_{3}+1)', r'\sin x_{1}\cdot (x_{2}+1)',r'\frac{\sin(3x_{2})}{5}', r'x_{2}^{2}x_{3}', r'\sin^{-1}(x_{2})', r'2^{\frac{1}{2}}', r'(x_{2}+5)(x_{3}+2)', r'\sqrt[3]{2}', r'26!', r'\frac{x_{2}!}{2}', r'|x_{2}|', r'\log_{2} 8', r'\sqrt{\frac{95}{24}}', r'-x_{2}^{2}-x_{2}-3', r'\frac{1}{x_{2}-x_{3}}(x_{0}^{-x_{3}x_{4}}-x_{0}^{-x_{5}})', r'\arcsin(\frac{10}{13})', r'\arcsin{\frac{10}{13}}', r'\pi x_{2}', r'x_{2}/2-1/4+x_{3}x_{0}^{-2x_{4}}', r'\cos(x_{2}x_{3})/x_{4}', r'\sin^{2}x_{2}', r'\sin^{2} x_{2}\cos x_{3}', r'\tan^{-1} x_{2}', '9^{9^{9}}', '10^{10^{10}}', '100000000!', '(((((((((((((((x_{2}))))))))))))))', r'3\cdot -2', r'1,234', r'x_{2}=3', r'5\%', r'\binom{10}{3}', r'x_{2}\times 10^{3}']
for rep in range(3):
  t1=time.time()
  for s in L:
    t0=time.time()
    try:
        e=latex2sympy(s, is_real=False, convert_degrees=False, normalization_config=None)
        out=str(e) if '9^' not in s and '0!' not in s else type(e)
    except Exception as ex: out='ERR '+repr(ex)[:80]
    if rep==2: print(f'{1000*(time.time()-t0):.1f}ms', s,'=>',out)
  print(time.time()-t1)
